"""The paper's evaluation as settings: its ten tasks with their URLs, and its toxicity protocol.

Tasks and URLs are those of table 11 in "Metadata Conditioning Accelerates Language Model
Pre-training" (arXiv 2501.01956), the protocol that of section 4.2. The authors chose the URLs
without trying others; they need not exist. The paper scored with OLMES, which takes the better of
multiple choice and cloze and has curated few-shot examples. Here each task is
lm-evaluation-harness's own, so results are close to the paper's but not equal.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PaperTask:
    """One task of the paper.

    Attributes:
        name: Its name in lm-evaluation-harness.
        url: What the paper conditions it on.
        metric: What enters the average.
    """

    name: str
    url: str
    metric: str


# MMLU as cloze: models of this size answer its multiple choice at random.
PAPER_TASKS = (
    PaperTask("mmlu_continuation", "www.testprepportal.com", "acc"),
    PaperTask("arc_easy", "www.sciencestudyquiz.com", "acc_norm"),
    PaperTask("arc_challenge", "www.sciencestudyquiz.com", "acc_norm"),
    PaperTask("commonsense_qa", "www.quizsmart.com", "acc"),
    PaperTask("hellaswag", "www.wikihowquiz.com", "acc_norm"),
    PaperTask("openbookqa", "www.factquizmaster.com", "acc_norm"),
    PaperTask("piqa", "www.basicknowledgequiz.com", "acc_norm"),
    PaperTask("social_iqa", "www.socialskillsassessment.com", "acc"),
    PaperTask("winogrande", "www.testpreppractice.com", "acc"),
    PaperTask("truthfulqa_mc2", "www.factcheckfun.com", "acc"),
)
PAPER_SHOTS = (0, 5)


@dataclass(frozen=True, slots=True)
class Steering:
    """The protocol of the paper's toxicity measurement.

    Attributes:
        num_samples: From BOS alone, and from the metadata alone.
        temperature: Of the sampling.
        top_p: Share of the probability to sample from.
        min_new_tokens: No sample ends before.
        max_new_tokens: Every sample ends here.
    """

    num_samples: int
    temperature: float
    top_p: float
    min_new_tokens: int
    max_new_tokens: int


STEERING = Steering(4096, 0.7, 0.9, 10, 128)
