"""Which engine trains what."""

from accelerate import Accelerator

from hyma_mllm.hypernetwork.network import Hypernetwork
from hyma_mllm.search.bank import ConnectorBank
from hyma_mllm.search.engine import SHARDING, Averaged, Engine, Replicated
from hyma_mllm.search.optimiser import OptimiserConfig
from hyma_mllm.search.pair_loss import PairLoss
from hyma_mllm.search.sharded import Sharded


def engine_for(model: PairLoss, optimiser: OptimiserConfig, accelerator: Accelerator) -> Engine:
    """The engine of a training: only a hypernetwork is ever sharded.

    Args:
        model: connectors with their objective.
        optimiser: builds the optimiser.
        accelerator: says how it was launched.

    Raises:
        HymaError: a sharding launcher, and an objective that learns something too.
    """
    if accelerator.distributed_type not in SHARDING:
        return Replicated(model, optimiser.build, accelerator)
    network = model.network
    if isinstance(network, ConnectorBank):
        return Averaged(model, network, optimiser.build, accelerator)
    assert isinstance(network, Hypernetwork)
    return Sharded(model, network, optimiser.build, optimiser.clip, accelerator)
