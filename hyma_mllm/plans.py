"""The plan of a run on the screen, before anything expensive."""

from collections.abc import Callable, Sequence

from accelerate import Accelerator

from hyma_mllm.command import console
from hyma_mllm.planning.needs import C, Change, Plan, refuse_what_cannot_fit


def tell_or_refuse(
    config: C, plan: Callable[[C], Plan], changes: Sequence[Change[C]], accelerator: Accelerator, remark: str
) -> None:
    """Print what a run needs beside what there is, on the main process, and refuse on every one what cannot fit.

    Args:
        config: the run.
        plan: configuration -> plan.
        changes: settings to offer where it does not fit, those that change the result least first.
        accelerator: says which process prints.
        remark: printed under the table; empty for none.

    Raises:
        HymaError: it does not fit; it names settings that would.
    """
    if accelerator.is_main_process:
        console().print(plan(config).table())
        if remark:
            console().print(remark)
    refuse_what_cannot_fit(config, plan, changes)
