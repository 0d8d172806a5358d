"""Tasks for lm-evaluation-harness made of local files only: multiple choice, perplexity and free answers."""

import json
from pathlib import Path
from typing import Any

QUESTIONS: list[dict[str, Any]] = [
    {"question": "the sum of two and two is", "choices": ["four", "five", "six"], "answer": 0},
    {"question": "a cat is an", "choices": ["animal", "idea"], "answer": 0},
    {"question": "water is", "choices": ["dry", "wet", "red", "loud"], "answer": 1},
    {"question": "the day after monday is", "choices": ["sunday", "tuesday"], "answer": 1},
    {"question": "up is not", "choices": ["down", "up"], "answer": 0},
]


def write_tasks(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    lines = "\n".join(json.dumps({**row, "gold": row["choices"][row["answer"]]}) for row in QUESTIONS)
    (folder / "questions.jsonl").write_text(lines + "\n")
    file = folder / "questions.jsonl"
    source = f"dataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {file}\ntest_split: test\n"
    (folder / "choice.yaml").write_text(
        "task: local_choice\n" + source + "output_type: multiple_choice\ndoc_to_text: '{{question}}'\n"
        "doc_to_choice: '{{choices}}'\ndoc_to_target: answer\n"
        "metric_list:\n  - metric: acc\n    aggregation: mean\n    higher_is_better: true\n"
    )
    (folder / "rolling.yaml").write_text(
        "task: local_rolling\n" + source + "output_type: loglikelihood_rolling\ndoc_to_text: ''\n"
        "doc_to_target: '{{question}}'\nmetric_list:\n  - metric: bits_per_byte\n"
    )
    (folder / "free.yaml").write_text(
        "task: local_free\n" + source + "output_type: generate_until\ndoc_to_text: '{{question}}'\n"
        "doc_to_target: '{{gold}}'\ngeneration_kwargs:\n  until: ['.']\n  max_gen_toks: 6\n  do_sample: false\n"
        "metric_list:\n  - metric: exact_match\n    aggregation: mean\n    higher_is_better: true\n"
    )
    return folder
