"""vLLM as a runtime, in an environment of its own.

Shapes: N chunks, S tokens of a chunk.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from moesaic.evaluation.bench.runtimes._base import Ids, Runtime, first_scored, mean
from moesaic.serving.vllm.process import VllmProcess


class Vllm(Runtime):
    """A directory served by vLLM on the processor.

    Args:
        directory: Of the model.
        dtype: Of its weights.
        length: Positions of a sequence.
        requests: Sequences at once.
        threads: Of its arithmetic.

    Raises:
        RunError: If it cannot load the model.
    """

    def __init__(
        self, directory: Path, *, dtype: str, length: int, requests: int, threads: int
    ) -> None:
        self.process = VllmProcess(
            directory,
            dtype=dtype,
            # A scored chunk is followed by a token that nobody wants.
            length=length + 1,
            threads=threads,
            max_num_seqs=requests,
            enable_prefix_caching=False,
        )

    def write(self, prompts: Ids, new_tokens: int) -> list[list[int]]:
        """Continue prompts side by side."""
        return [each.tokens for each in self.process.write(prompts, new_tokens)]

    def nll(self, chunks_NS: Tensor) -> float:
        """Mean loss of the second half of each chunk."""
        # The first token has no log-probability.
        first = first_scored(chunks_NS.shape[1]) - 1
        found = self.process.write(chunks_NS.tolist(), 1, score=True)
        return mean([-mean(each.prompt_logprobs[first:]) for each in found])

    def close(self) -> None:
        """End its process."""
        self.process.close()
