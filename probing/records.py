"""What a run's record says of its model and tasks (``run.json``)."""

from __future__ import annotations

from typing import Any

from probing.planning import ProbePlan
from probing.tasks.base import Task


def model_facts(plan: ProbePlan) -> dict[str, Any]:
    """Name, digests and shape of the model that a plan probes; ``probed`` says the shape of every probed stack."""
    loaded, stack = plan.loaded, plan.stack
    return {
        "name": loaded.name,
        "reference": loaded.reference,
        "revision": loaded.revision,
        "weights_digest": loaded.weights_digest,
        "adapter_digest": loaded.adapter_digest,
        "tokenizer_digest": loaded.tokenizer_digest,
        "stack": stack.name,
        "blocks": stack.num_blocks,
        "width": stack.width,
        "bias_roles": list(stack.bias_roles),
        "has_biases": stack.has_biases,
        "causal": stack.causal,
        "stacks": {s.name: s.num_blocks for s in loaded.stacks},
        "probed": {
            s.name: {
                "blocks": s.num_blocks,
                "width": s.width,
                "bias_roles": list(s.bias_roles),
                "causal": s.causal,
                "cross_attention": s.cross_branch is not None,
            }
            for s in plan.stacks
        },
        "parameters": sum(p.numel() for p in loaded.model.parameters()),
        "notes": list(loaded.notes),
    }


def task_facts(task: Task) -> dict[str, Any]:
    """Level, unit, sizes, labels and source of a task."""
    split = task.items["split"]
    return {
        "level": task.level,
        "unit": task.unit,
        "kind": task.kind,
        "description": task.description,
        "n_train": int((split == "train").sum()),
        "n_dev": int((split == "dev").sum()),
        "n_test": {s: int((split == s).sum()) for s in task.test_splits},
        "labels": list(task.labels)[:100],
        "source": task.source,
        "licence": task.licence,
        "citation": task.citation,
        "digest": task.digest,
        "notes": list(task.notes),
    }
