"""The causal search's task: vision tokens and questions, answered by frozen LLMs that a connector lets see.

LLM-major: the pairs of a visit share one LLM, and all their towers ride through it as one stacked batch.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.nn import functional

from hyma_mllm import connectors
from hyma_mllm.connectors import ConnectorGroup, ConnectorSpec
from hyma_mllm.data.prompt_batches import PASS_TOKENS, by_length
from hyma_mllm.data.prompts import IGNORE, TextBatch
from hyma_mllm.data.question_sets import asked
from hyma_mllm.data.rows import Row
from hyma_mllm.pairs import PairGrid
from hyma_mllm.search import causal_flops
from hyma_mllm.search.mllm_parts import LLMFacts, QuestionBatch, Reader, Scorer, Tower
from hyma_mllm.search.pair_loss import ConnectorSource, Scored

T = TypeVar("T")


@dataclass
class MLLMTask:
    """Everything a causal search reads; nothing here is trained.

    Attributes:
        grid: the pairs, `vision_to_text`.
        towers: the N vision towers.
        readers: by number, the LLMs that this process works with; all of them unless the work is pair-parallel.
        facts: of all M LLMs.
        rows: all questions.
        picture: [questions] int64, the row of each question's picture in `Tower.tokens`.
        train, validation: [questions of the split] int64.
        tests: test set -> [questions] int64; the first one ranks.
        chunk: questions that are answered at once.
        longest_answer: tokens after which an answer is cut.
        suffix: what every question of one turn ends in.
        open_reader: opens an LLM that this process did not work with.
        scorer: (rows, answers) -> measures in percent, the accuracy first.
    """

    grid: PairGrid
    towers: list[Tower]
    readers: dict[int, Reader]
    facts: list[LLMFacts]
    rows: list[Row]
    picture: Tensor
    train: Tensor
    validation: Tensor
    tests: dict[str, Tensor]
    chunk: int = 32
    longest_answer: int = 10
    suffix: str = ""
    open_reader: Callable[[int], Reader] = field(kw_only=True)
    scorer: Scorer = field(kw_only=True)
    _scales: dict[str, list[float]] = field(default_factory=dict, init=False)
    _blind: dict[str, list[dict[str, float]]] = field(default_factory=dict, init=False)

    def visit_groups(self) -> list[int]:
        """Pairs of one LLM share a visit."""
        return [pair.text for pair in self.grid.pairs()]

    def batch(self, rows: Tensor, seed: int, number: int) -> QuestionBatch:
        """These questions; nothing is drawn."""
        return QuestionBatch(rows, rows)

    def share(self, batch: QuestionBatch, part: slice) -> QuestionBatch:
        """The questions of one process."""
        return QuestionBatch(batch.questions[part], batch.whole)

    def losses(
        self, groups: list[ConnectorGroup], spec: ConnectorSpec, objective: nn.Module, batch: QuestionBatch
    ) -> Tensor:
        """Loss of each pair, [pairs] in the order the pairs were asked for, float32: the mean over answer tokens.

        Questions of like length go through the LLM together, which changes no value.
        Across processes the mean of the shares' losses is the whole batch's: each is weighted by its answer tokens.
        """
        reader = self.readers[self._llm_of(groups)]
        rows = batch.questions.tolist()
        sums, own = torch.zeros(()), 0
        pairs = sum(len(group.pairs) for group in groups)
        for part in by_length([reader.encoded[row].passed for row in rows], PASS_TOKENS // pairs):
            questions = batch.questions[torch.tensor(part)]
            text = reader.texts(questions.tolist())
            count = int((text.labels != IGNORE).sum())
            sums = sums + objective(*self._hidden(groups, spec, questions, text), reader.model.head()) * count
            own += count
        if len(batch.whole) == len(batch.questions):
            return sums / own
        whole = sum(sum(label != IGNORE for label in reader.encoded[row].labels) for row in batch.whole.tolist())
        return sums * (len(batch.whole) / (len(batch.questions) * whole))

    def _llm_of(self, groups: Sequence[ConnectorGroup]) -> int:
        found = {self.grid.pair(int(index)).text for group in groups for index in group.pairs}
        if len(found) != 1:
            raise ValueError(f"the pairs of a visit share one LLM, not {sorted(found)}")
        return found.pop()

    def _hidden(
        self, groups: list[ConnectorGroup], spec: ConnectorSpec, questions: Tensor, text: TextBatch
    ) -> tuple[Tensor, Tensor]:
        """Hidden states of the text tokens [pairs, batch, length - 1, width], and their labels [batch, length].

        A state predicts the label behind it. No text begins with an answer, so the picture's own states predict none;
        and the last label of the batch, with what stands behind it, is never read.
        """
        reader = self.readers[self._llm_of(groups)]
        seen, seen_mask = self.seen(groups, spec, self.picture[questions])
        pairs, batch, longest, width = seen.shape
        device = seen.device
        length = 1 + int((text.labels != IGNORE).any(0).nonzero().max())
        words = reader.model.embed(text.after[:, : length - 1].to(device))
        embeddings = torch.cat([seen.to(words.dtype), words.expand(pairs, -1, -1, -1)], 2).flatten(0, 1)
        mask = torch.cat(
            [
                seen_mask[:, None].expand(-1, batch, -1),
                text.mask[:, : length - 1].to(device).expand(pairs, -1, -1),
            ],
            2,
        ).flatten(0, 1)
        hidden = reader.model.hidden(embeddings, mask, reader.prefix)
        return hidden.view(pairs, batch, -1, width)[:, :, longest:], text.labels[:, :length].to(device)

    def seen(self, groups: list[ConnectorGroup], spec: ConnectorSpec, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """The pictures in the LLM's input space.

        Returns:
            [pairs, batch, tokens, width] float32, pairs in the order they were asked for, and what of the tokens is
            a picture [pairs, tokens] bool: a tower of fewer tokens than another has its padding in front.
        """
        involved = {self.grid.pair(int(index)).vision for group in groups for index in group.pairs}
        read = {vision: self.towers[vision].read(pictures) for vision in involved}
        longest = max(self.towers[vision].count for vision in involved)
        scales = self.scales(spec)
        parts, positions, masks = [], [], []
        for group in groups:
            visions = [self.grid.pair(int(index)).vision for index in group.pairs]
            device = next(iter(group.params.values())).device
            padded = [
                functional.pad(read[vision], (0, 0, longest - self.towers[vision].count, 0)) for vision in visions
            ]
            scale = torch.tensor([scales[int(index)] for index in group.pairs], device=device)
            mapped = connectors.apply(spec, group.params, torch.stack(padded).to(device))
            parts.append(mapped * scale[:, None, None, None])
            positions.append(group.positions)
            counts = torch.tensor([self.towers[vision].count for vision in visions], device=device)
            masks.append(torch.arange(longest, device=device) >= longest - counts[:, None])
        order = torch.argsort(torch.cat(positions))
        seen, mask = torch.cat(parts), torch.cat(masks)
        return seen[order.to(seen.device)], mask[order.to(seen.device)]

    @torch.no_grad()
    def scales(self, spec: ConnectorSpec) -> list[float]:
        """What each pair's connector output is multiplied by.

        A fresh connector then writes vectors as long as the LLM's own input embeddings, whose RMS differs 64-fold
        between LLMs.
        """
        if spec.name not in self._scales:
            few = self.picture[self.train[:64]]
            found = []
            for pair in self.grid.pairs():
                tokens = self.towers[pair.vision].read(few).float()
                fresh = connectors.initial(
                    spec, self.grid.shape(pair.index), 1, torch.Generator().manual_seed(pair.index)
                )
                fresh = {name: value.to(tokens.device) for name, value in fresh.items()}
                rms = connectors.apply(spec, fresh, tokens[None]).square().mean().sqrt()
                found.append(self.facts[pair.text].embedding_rms / float(rms))
            self._scales[spec.name] = found
        return self._scales[spec.name]

    @torch.no_grad()
    def means(self) -> tuple[list[Tensor], list[Tensor]]:
        """Mean token of each tower over the training pictures, and mean input embedding of each LLM; [width] each."""
        return [tower.mean for tower in self.towers], [llm.mean_embedding for llm in self.facts]

    def validate(self, source: ConnectorSource, spec: ConnectorSpec) -> Scored:
        """Share of validation questions whose whole answer is the likeliest at every token, and the answers' loss.

        Greedy decoding would give exactly that answer, so no text is generated here.
        """
        headline = next(iter(self.tests))
        found = self._per_llm(partial(self._matches, spec=spec, questions=self.validation), source)
        scores = {headline: [100.0 * match for match, _ in found]}
        return Scored(
            scores,
            {"validation loss": [loss for _, loss in found]},
            causal_flops.scoring(self, spec, self.validation),
        )

    @torch.no_grad()
    def _matches(
        self, groups: list[ConnectorGroup], spec: ConnectorSpec, questions: Tensor
    ) -> list[tuple[float, float]]:
        """(share of rows whose labels are all likeliest, mean loss of their tokens) for each pair of the groups."""
        reader = self.readers[self._llm_of(groups)]
        right, loss, tokens = torch.zeros(()), torch.zeros(()), 0
        for part in torch.split(questions, self.chunk):
            hidden, labels = self._hidden(groups, spec, part, reader.texts(part.tolist()))
            labels = labels[:, 1:]
            supervised = labels != IGNORE
            targets = labels[supervised]
            rows = torch.arange(len(part), device=labels.device)[:, None].expand_as(labels)[supervised]
            matches, losses = [], []
            for states in hidden:
                logits = reader.model.logits(states[supervised])
                wrong = torch.zeros(len(part), device=labels.device)
                wrong.index_add_(0, rows, (logits.argmax(-1) != targets).float())
                matches.append((wrong == 0).sum())
                losses.append(functional.cross_entropy(logits, targets, reduction="sum"))
            right, loss, tokens = right + torch.stack(matches), loss + torch.stack(losses), tokens + len(targets)
        return list(zip((right / len(questions)).tolist(), (loss / tokens).tolist(), strict=True))

    def evaluate(self, source: ConnectorSource, spec: ConnectorSpec) -> Scored:
        """Generated answers to every test set, scored; beside each score what the same LLM says without the picture."""
        scores: dict[str, list[float]] = {}
        details: dict[str, list[float]] = {}
        total = 0.0
        for name, questions in self.tests.items():
            answers = self._per_llm(partial(self.answers, spec=spec, questions=questions), source)
            measured = [self._scored(questions, said) for said in answers]
            headline = next(iter(measured[0]))
            scores[name] = [each[headline] for each in measured]
            for measure in list(measured[0])[1:]:
                details[f"{name} {measure}"] = [each[measure] for each in measured]
            blind = self.blind(name)
            details[f"blind {name}"] = [blind[pair.text][headline] for pair in self.grid.pairs()]
            total += causal_flops.scoring(self, spec, questions, self.longest_answer)
        validation = self.validate(source, spec)
        details["validation " + next(iter(self.tests))] = next(iter(validation.scores.values()))
        details |= validation.details
        blind_loss = self.blind("validation")
        details["blind validation loss"] = [blind_loss[pair.text]["loss"] for pair in self.grid.pairs()]
        return Scored(scores, details, total + validation.flops)

    def _scored(self, questions: Tensor, answers: Sequence[str]) -> Mapping[str, float]:
        return self.scorer([self.rows[row] for row in questions.tolist()], answers)

    def _per_llm(self, work: Callable[[list[ConnectorGroup]], list[T]], source: ConnectorSource) -> list[T]:
        """What `work` finds for each pair, in grid order; it gets the connectors of one LLM's pairs at a time.

        Each process works with its own LLMs, and all learn what the others found.
        """
        found: dict[int, T] = {}
        for llm in self.readers:
            members = [pair.index for pair in self.grid.pairs() if pair.text == llm]
            with torch.no_grad():
                groups = source(members)
            found |= zip(members, work(groups), strict=True)
        everywhere = dict(gather_object(list(found.items())))
        return [everywhere[index] for index in range(len(self.grid))]

    @torch.no_grad()
    def answers(self, groups: list[ConnectorGroup], spec: ConnectorSpec, questions: Tensor) -> list[list[str]]:
        """Greedy answers [pairs][questions] of pairs that share an LLM."""
        reader = self.readers[self._llm_of(groups)]
        pairs = sum(len(group.pairs) for group in groups)
        found: list[list[str]] = [[] for _ in range(pairs)]
        for part in torch.split(questions, self.chunk):
            seen, mask = self.seen(groups, spec, self.picture[part])
            for position, said in enumerate(self._generated(reader, part, seen, mask)):
                found[position] += said
        return found

    def _generated(self, reader: Reader, questions: Tensor, seen: Tensor, seen_mask: Tensor) -> list[list[str]]:
        """Answers [pairs][questions] to pictures seen as [pairs, batch, tokens, width], of which `seen_mask` counts.

        Rows are padded on the left, between the prefix and the picture.
        """
        pairs, batch, longest, width = seen.shape
        prompts = [reader.prompter.prompt(asked(self.rows[row], self.suffix)) for row in questions.tolist()]
        length = max(map(len, prompts))
        words = [reader.model.embed(torch.tensor(ids, device=seen.device)) for ids in prompts]
        embeddings = words[0].new_zeros(pairs, batch, longest + length, width)
        mask = torch.zeros(pairs, batch, longest + length, dtype=torch.bool, device=seen.device)
        for column, word in enumerate(words):
            start = length - len(word)
            embeddings[:, column, start + longest :] = word
            embeddings[:, column, start : start + longest] = seen[:, column].to(word.dtype)
            mask[:, column, start + longest :] = True
            mask[:, column, start : start + longest] = seen_mask
        ids = reader.model.generate(embeddings.flatten(0, 1), mask.flatten(0, 1), self.longest_answer, reader.prefix)
        said = [reader.prompter.decode(row) for row in ids]
        return [said[start : start + batch] for start in range(0, len(said), batch)]

    @torch.no_grad()
    def blind(self, name: str) -> list[dict[str, float]]:
        """For each LLM its measures without any picture token, same words; `validation` gives its `loss` only.

        Args:
            name: a test set, or `validation`.
        """
        if name not in self._blind:
            questions = self.tests.get(name)
            own = {
                llm: dict(self._scored(questions, self.blind_answers(llm, questions)))
                if questions is not None
                else self._blind_loss(reader)
                for llm, reader in self.readers.items()
            }
            everywhere = dict(gather_object(list(own.items())))
            self._blind[name] = [everywhere[llm] for llm in range(len(self.facts))]
        return self._blind[name]

    def read_with(self, llm: int) -> None:
        """Make sure that this process holds an LLM, for answers after the search."""
        if llm not in self.readers:
            self.readers[llm] = self.open_reader(llm)

    @torch.no_grad()
    def blind_answers(self, llm: int, questions: Tensor) -> list[str]:
        """What an LLM says to these questions without a picture."""
        reader = self.readers[llm]
        said: list[str] = []
        for part in torch.split(questions, self.chunk):
            nothing = torch.zeros(1, len(part), 0, reader.model.width, device=reader.device)
            empty = torch.zeros(1, 0, dtype=torch.bool, device=reader.device)
            said += self._generated(reader, part, nothing, empty)[0]
        return said

    def _blind_loss(self, reader: Reader) -> dict[str, float]:
        loss, tokens = 0.0, 0
        for part in torch.split(self.validation, self.chunk):
            text = reader.texts(part.tolist())
            words, mask = reader.model.embed(text.after.to(reader.device)), text.mask.to(reader.device)
            hidden = reader.model.hidden(words, mask, reader.prefix)[:, :-1]
            supervised = text.labels[:, 1:] != IGNORE
            targets = text.labels[:, 1:][supervised].to(reader.device)
            hidden = hidden[supervised.to(reader.device)]
            loss += float(functional.cross_entropy(reader.model.logits(hidden), targets, reduction="sum"))
            tokens += len(targets)
        return {"loss": loss / tokens}

    def visit_flops(self, spec: ConnectorSpec, pairs: Sequence[int], batch: int) -> float:
        """Analytic forward and backward FLOPs of the task loss of one visit, without the hypernetwork."""
        return sum(causal_flops.step(self, spec, index, batch) for index in pairs)
