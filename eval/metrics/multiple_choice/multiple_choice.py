"""Multiple choice as a module of the `evaluate` library; the arithmetic is hyma_mllm.metrics.vqa_choice."""

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate  # type: ignore[import-untyped]

from hyma_mllm.metrics.vqa_choice import multiple_choice

_CITATION = """@inproceedings{lu2022learn, title={Learn to Explain: Multimodal Reasoning via Thought Chains for Science
Question Answering}, author={Lu, Pan and others}, booktitle={NeurIPS}, year={2022}}"""


class MultipleChoice(evaluate.Metric):  # type: ignore[misc]
    """Accuracy of the letter that each answer names, over all questions and over those with a picture, in percent."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=str(self.__doc__),
            citation=_CITATION,
            inputs_description=str(multiple_choice.__doc__),
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
        )

    def _compute(
        self,
        predictions: Sequence[str],
        references: Sequence[str],
        choices: Sequence[Sequence[str]],
        with_image: Sequence[bool] | None = None,
        question_types: Sequence[str | None] | None = None,
    ) -> dict[str, Any]:
        return multiple_choice(predictions, references, choices, with_image, question_types)
