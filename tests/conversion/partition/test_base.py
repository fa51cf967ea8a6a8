import pytest
import torch

from moesaic._errors import InputError
from moesaic.conversion.partition._base import PartitionInput, validate_num_experts


@pytest.mark.parametrize("num_experts", [1, 2, 8, 96, 192, 1536])
def test_divisors_are_accepted(num_experts):
    validate_num_experts(1536, num_experts)


@pytest.mark.parametrize(
    ("num_neurons", "num_experts", "message"),
    [
        (1536, 7, r"experts=7 .* 1536; the nearest that do are 6 and 8"),
        (11008, 100, r"experts=100 .* 11008; the nearest that do are 86 and 128"),
        (13, 5, r"experts=5 .* 13; the nearest that do are 1 and 13"),
        (1536, 0, r"between 1 and the FFN width 1536, got 0; the nearest that works is 1$"),
        (1536, -3, r"between 1 and the FFN width 1536, got -3; the nearest that works is 1$"),
        (1536, 1537, r"got 1537; the nearest that works is 1536"),
        (0, 1, r"FFN width must be at least 1, got 0"),
    ],
)
def test_others_name_the_nearest(num_neurons, num_experts, message):
    with pytest.raises(InputError, match=message):
        validate_num_experts(num_neurons, num_experts)


def test_the_input_checks_itself():
    with pytest.raises(InputError, match=r"the nearest that do are 2 and 4"):
        PartitionInput(num_experts=3, num_neurons=8)
    with pytest.raises(InputError, match=r"seed must be at least 0, got -1"):
        PartitionInput(num_experts=2, num_neurons=8, seed=-1)
    with pytest.raises(InputError, match=r"up_FD .* 8 neurons, got the shape \(6, 8\)"):
        PartitionInput(num_experts=2, num_neurons=8, up_FD=torch.zeros(6, 8))
    with pytest.raises(InputError, match=r"down_DF .* 8 neurons, got the shape \(8, 6\)"):
        PartitionInput(num_experts=2, num_neurons=8, down_DF=torch.zeros(8, 6))
    with pytest.raises(InputError, match=r"coactivation_FF must have the shape \(8, 8\)"):
        PartitionInput(num_experts=2, num_neurons=8, stats={"coactivation_FF": torch.zeros(8)})
    with pytest.raises(InputError, match=r"energy_F must have the shape \(8,\), got \(7,\)"):
        PartitionInput(num_experts=2, num_neurons=8, stats={"energy_F": torch.zeros(7)})
