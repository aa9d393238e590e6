"""What a model is to answer, a JSON object per line: `prompts:FILE`.

Either a prompt and its target (translation, summarization), under the names that `prompt=` and `target=` give, or a
dialogue: a list under `turns=` of objects with "role" (system, user or assistant) and "content". Only the target, or
what the assistant says, is to be learned.
"""

from __future__ import annotations

from typing import Any

from experiments.tasks.examples import Conversations, Task, Turn
from experiments.tasks.lines import json_objects, malformed, text_field
from experiments.tasks.spec import Spec
from experiments.tasks.splits import split_task

OPTIONS = {"prompt": "prompt", "target": "target", "turns": "messages"}
ROLES = ("system", "user", "assistant")


def load(spec: Spec) -> Task[Conversations]:
    """Reads a task.

    Raises:
      ValueError: a file is missing, or not what is expected, with the line.
    """
    examples = {
        split: Conversations(tuple(_turns(spec, path, line, row) for line, row in json_objects(path)))
        for split, path in spec.find((".jsonl",)).items()
    }
    return split_task(spec.data, (), examples)


def _turns(spec: Spec, path: str, line: int, row: dict[str, Any]) -> tuple[Turn, ...]:
    prompt, target, turns = (spec.options[name] for name in OPTIONS)
    if turns not in row:
        if prompt not in row:
            raise malformed(path, line, f"expected {prompt!r} and {target!r}, or a list under {turns!r}.")
        return (
            Turn("user", text_field(path, line, row, prompt)),
            Turn("assistant", text_field(path, line, row, target)),
        )
    said = row[turns]
    if not isinstance(said, list) or not all(isinstance(turn, dict) for turn in said):
        raise malformed(path, line, f"expected a list of objects with 'role' and 'content' under {turns!r}.")
    for turn in said:
        if turn.get("role") not in ROLES:
            raise malformed(path, line, f"a role is {turn.get('role')!r:.40}: expected one of {', '.join(ROLES)}.")
    if not any(turn["role"] == "assistant" for turn in said):
        raise malformed(path, line, "the assistant says nothing: expected a turn of its to learn from.")
    return tuple(Turn(turn["role"], text_field(path, line, turn, "content")) for turn in said)
