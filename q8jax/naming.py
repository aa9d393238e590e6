"""How a dot signs the operations that it is traced to, so that `audit` finds them in the compiled program."""

import re
from typing import Any

import jax

_MARK = "q8jax"
_PATH = f"{_MARK}-path:"  # XLA cuts a name at an @
_ROLE = re.compile(rf"{_MARK}:(\w+):(\w+):(\w+)")
# What JAX puts into names for control flow and transforms.
_PLUMBING = re.compile(
    r"jit\(.*|pjit|while|body|cond|scan|closed_call|core_call|checkpoint|rematted_computation|remat\d?|shard_map|"
    r"branch_\d+_fun|custom_(jvp|vjp)_call(_jaxpr)?|custom_vmap_call"
)
_TRANSFORMS = re.compile(r"^(?:(?:transpose|jvp|vmap|linearize)\()+")


def role_scope(role: str, first: str, second: str) -> Any:
    """Context in which a GEMM is traced, 'fwd', 'dlhs' or 'drhs', whose operands are wanted in these formats."""
    return jax.named_scope(f"{_MARK}:{role}:{first}:{second}")


def path_scope(path: str) -> Any:
    """Context in which the dot of a layer is traced that knows its path in the model."""
    return jax.named_scope(_PATH + path)


def marked_role(name: str) -> tuple[str, tuple[str, str]] | None:
    """The role and the formats in a name stack; None if no dot of ours signed it."""
    found = _ROLE.search(name)
    return (found[1], (found[2], found[3])) if found else None


def path_of(name: str) -> str:
    """The path of a layer in the name stack of one of its operations: what is left without JAX's own parts."""
    if _PATH in name:
        name = name[name.rindex(_PATH) + len(_PATH) :]
    parts = []
    for part in name.split("/"):
        plain = part if part.startswith("jit(") else _TRANSFORMS.sub("", part).rstrip(")")
        if plain.startswith(f"{_MARK}:"):
            break
        if plain and not _PLUMBING.fullmatch(plain):
            parts.append(plain)
    else:
        parts = parts[:-1]  # the primitive
    return "/".join(parts)
