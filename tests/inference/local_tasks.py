"""Tasks of lm-evaluation-harness with local data: choice, generation, perplexity."""

from __future__ import annotations

import json
import random
from pathlib import Path

LENGTH = 192

TASK = """
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/test.jsonl, train: {folder}/train.jsonl}}}}
test_split: test
fewshot_split: train
fewshot_config: {{sampler: first_n}}
"""
CHOICE = """
output_type: multiple_choice
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
ASK = 'doc_to_text: "Q: {{question}}\\nA:"\n'
TASKS = {
    "local_choice": CHOICE + ASK,
    "local_empty": CHOICE + 'doc_to_text: ""\n',
    "local_words": ASK
    + """
output_type: generate_until
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 6, do_sample: false}
metric_list: [{metric: exact_match}]
""",
    "local_rolling": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list: [{metric: word_perplexity}]
""",
}


def write_tasks(folder: Path) -> Path:
    """Write 30 questions, 8 examples, and the tasks over them."""
    draw = random.Random(1)
    words = ["fox", "dog", "cat", "red", "green", "blue", "one", "two", "three", "four"]

    def some(longest: int) -> str:
        return " ".join(draw.choice(words) for _ in range(draw.randint(1, longest)))

    for name, number in (("test", 30), ("train", 8)):
        documents = [
            {
                "question": some(6),
                "choices": [some(3) for _ in range(4)],
                "answer": draw.randrange(4),
            }
            for _ in range(number)
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, documents)))
    for name, text in TASKS.items():
        (folder / f"{name}.yaml").write_text(f"task: {name}" + TASK.format(folder=folder) + text)
    (folder / "group.yaml").write_text(
        "group: local_group\ntask: [local_choice, local_empty]\n"
        "aggregate_metric_list: [{metric: acc, weight_by_size: true}]\n"
    )
    (folder / "missing.yaml").write_text(
        "task: local_missing" + TASK.format(folder=folder / "gone") + CHOICE + ASK
    )
    return folder
