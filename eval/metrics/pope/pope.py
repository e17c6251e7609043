"""POPE as a module of the `evaluate` library; the arithmetic is hyma_mllm.metrics.vqa_pope."""

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate  # type: ignore[import-untyped]

from hyma_mllm.metrics.vqa_pope import pope

_CITATION = """@inproceedings{li2023pope, title={Evaluating Object Hallucination in Large Vision-Language Models},
author={Li, Yifan and others}, booktitle={EMNLP}, year={2023}}"""


class Pope(evaluate.Metric):  # type: ignore[misc]
    """Accuracy, precision, recall, F1 and yes ratio of yes/no answers, in percent."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=str(self.__doc__),
            citation=_CITATION,
            inputs_description=str(pope.__doc__),
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
        )

    def _compute(
        self,
        predictions: Sequence[str],
        references: Sequence[str],
        question_types: Sequence[str | None] | None = None,
    ) -> dict[str, Any]:
        return pope(predictions, references, question_types)
