"""VQA accuracy as a module of the `evaluate` library; the arithmetic is hyma_mllm.metrics.vqa."""

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate  # type: ignore[import-untyped]

from hyma_mllm.metrics.vqa import Variant, accuracy

_CITATION = """@inproceedings{antol2015vqa, title={VQA: Visual Question Answering},
author={Antol, Stanislaw and others}, booktitle={ICCV}, year={2015}}"""


class VqaAccuracy(evaluate.Metric):  # type: ignore[misc]
    """min(matches / 3, 1) against nine of ten human answers, averaged over the one left out, in percent."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=str(self.__doc__),
            citation=_CITATION,
            inputs_description=str(accuracy.__doc__),
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Sequence(datasets.Value("string"))}
            ),
        )

    def _compute(
        self,
        predictions: Sequence[str],
        references: Sequence[Sequence[str]],
        variant: Variant = "evalai",
        question_types: Sequence[str | None] | None = None,
    ) -> dict[str, Any]:
        return accuracy(predictions, references, variant, question_types)
