"""What clients may ask: the requests of OpenAI's protocol, with the fields that mean something.

A field that would change the answer and that this server cannot honour is refused, never ignored.
The answers are built from the types that the package openai publishes.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator


def _whole(text: str) -> str:
    # JSON can spell half a surrogate pair, which is no character and which tokenizers cannot read.
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("the text holds half a surrogate pair, which is no character") from None
    return text


Text = Annotated[str, AfterValidator(_whole)]
Seed = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]
Zero = Annotated[float, Field(ge=0, le=0, description="not supported: 0 or left out")]
Stop = Annotated[Text, Field(min_length=1, max_length=256)]
TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
Prompt = Annotated[Text, Field(min_length=1)]


class StreamOptions(BaseModel):
    """How to stream."""

    model_config = ConfigDict(extra="forbid")

    include_usage: bool = False
    include_obfuscation: bool = False


class Common(BaseModel):
    """What both kinds of request share."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    model: Text
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] | None = 1.0
    n: Annotated[int, Field(ge=1)] | None = 1
    seed: Seed | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = None
    active: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None, description="fraction of the feed-forward networks to use; ours"
    )
    threshold: Annotated[float, Field(ge=0, lt=1)] | None = Field(
        None, description="threshold of the gates; ours"
    )
    frequency_penalty: Zero | None = 0.0
    presence_penalty: Zero | None = 0.0
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None
    # Said about a request, without effect on its answer.
    user: str | None = None
    metadata: dict[str, Any] | None = None
    safety_identifier: str | None = None
    service_tier: str | None = None
    store: bool | None = None

    @model_validator(mode="after")
    def _one_operating_point(self) -> Common:
        if self.active is not None and self.threshold is not None:
            raise ValueError("active and threshold say the same thing; give one of them")
        return self

    @property
    def stops(self) -> list[str]:
        """The stop strings."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())


class TextPart(BaseModel):
    """A part of a message; there is no other kind than text."""

    model_config = ConfigDict(extra="ignore")

    type: Literal["text"]
    text: Text


class Message(BaseModel):
    """A message of a conversation; what clients copy from answers beside these is let pass."""

    model_config = ConfigDict(extra="ignore")

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | list[TextPart]

    def plain(self) -> dict[str, str]:
        """As chat templates take it."""
        role = "system" if self.role == "developer" else self.role
        content = self.content
        if not isinstance(content, str):
            content = "".join(part.text for part in content)
        return {"role": role, "content": content}


class PlainFormat(BaseModel):
    """The only form of an answer."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["text"]


class ChatRequest(Common):
    """A request for the next message of a conversation."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: PlainFormat | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None

    @model_validator(mode="after")
    def _log_probabilities(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs to be true")
        return self

    @property
    def new_tokens(self) -> int | None:
        """New tokens that were asked for."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def num_likely(self) -> int | None:
        """Likeliest tokens to tell, none for no log-probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(Common):
    """A request to go on from a text, or from tokens."""

    prompt: (
        Prompt
        | Annotated[list[Prompt], Field(min_length=1)]
        | TokenIds
        | Annotated[list[TokenIds], Field(min_length=1)]
    )
    max_tokens: Annotated[int, Field(ge=1)] | None = 16
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    echo: Literal[False] | None = False
    suffix: None = None
    best_of: Annotated[int, Field(ge=1, le=1)] | None = None

    @property
    def new_tokens(self) -> int | None:
        """New tokens that were asked for."""
        return self.max_tokens

    @property
    def num_likely(self) -> int | None:
        """Likeliest tokens to tell, none for no log-probabilities."""
        return self.logprobs

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, each as text or as tokens."""
        prompt: Any = self.prompt
        if isinstance(prompt, str) or isinstance(prompt[0], int):
            return [prompt]
        return list(prompt)
