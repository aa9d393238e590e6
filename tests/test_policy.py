"""Policies: first match wins, and no rule is silently without effect."""

import numpy as np
import pytest
from test_recipe import random_recipe

from q8jax import Policy, Recipe

LAYERS = ("blocks/0/attention/qkv", "blocks/0/mlp/up", "blocks/1/mlp/up", "head")


def test_the_first_rule_that_matches_wins_and_the_rest_is_left_alone():
    policy = Policy.parse("blocks/0/.*->bf16; .*/mlp/up -> fp8/margin=1")
    resolved = policy.resolve(LAYERS)
    assert resolved == {
        "blocks/0/attention/qkv": Recipe.parse("bf16"),
        "blocks/0/mlp/up": Recipe.parse("bf16"),
        "blocks/1/mlp/up": Recipe.parse("fp8/margin=1"),
    }
    assert [policy.recipe_for(path) for path in LAYERS] == [resolved.get(path) for path in LAYERS]


def test_a_pattern_must_match_the_whole_path():
    policy = Policy.parse("mlp->fp8")
    assert policy.recipe_for("mlp/up") is None and policy.recipe_for("blocks/mlp") is None
    assert policy.recipe_for("mlp") == Recipe.parse("fp8")


def test_a_recipe_alone_covers_every_layer():
    for text in ("int8", "int8/margin=1", str(Recipe.parse("fp8-block"))):
        policy = Policy.parse(text)
        assert policy == Policy(((".*", Recipe.parse(text)),))
        assert set(policy.resolve(LAYERS).values()) == {Recipe.parse(text)}


def test_the_string_form_round_trips():
    random = np.random.default_rng(0)
    patterns = ["head", "blocks/[0-3]/.*", r"blocks/\d+/(up|down)", ".*", "a{1,2}=b"]
    for _ in range(100):
        rules = [(p, random_recipe(random)) for p in random.permutation(patterns)[:3]]
        policy = Policy(rules)
        assert Policy.parse(str(policy)) == policy
        assert hash(Policy.parse(str(policy))) == hash(policy)
        assert repr(policy) == f"Policy({str(policy)!r})"


def test_a_rule_without_effect_raises():
    for text, message in (
        ("hed->fp8", r"'hed' matches no layer: the layers are blocks/0/attention/qkv, .*, head\."),
        ("head->fp8;head->bf16", r"'head' is shadowed by earlier rules"),
        (".*->fp8;head->bf16", r"'head' is shadowed by earlier rules"),
        ("blocks.*->fp8;head->bf16;blocks/.*/mlp/up|head->int8", r"mlp/up\|head' is shadowed"),
    ):
        with pytest.raises(ValueError, match=message):
            Policy.parse(text).resolve(LAYERS)
    with pytest.raises(ValueError, match="the layers are none"):
        Policy.parse("fp8").resolve([])
    # A rule that decides one layer is of use, though another layer of it is decided before.
    assert len(Policy.parse("head->bf16;.*->fp8").resolve(iter(LAYERS))) == 4


@pytest.mark.parametrize(
    "text, message",
    [
        ("head->", "Unknown precision ''"),
        ("head->fp9", r"Unknown precision 'fp9' \(did you mean 'fp8'\?\)"),
        ("head->fp8;", "Policy rule '' has no recipe: write pattern->recipe"),
        ("head->fp8;mlp", "Policy rule 'mlp' has no recipe"),
        ("he(ad->fp8", r"'he\(ad' is not a regular expression"),
        ("head->fp8/margn=1", "Unknown recipe field 'margn'"),
    ],
)
def test_malformed_policies_raise_one_sentence(text, message):
    with pytest.raises(ValueError, match=message) as error:
        Policy.parse(text)
    assert "\n" not in str(error.value)


def test_construction_refuses_what_the_string_form_cannot_hold():
    fp8 = Recipe.parse("fp8")
    for rules, message in (
        ((), "at least one rule"),
        ((("a;b", fp8),), "has a -> or ;"),
        ((("a->b", fp8),), "has a -> or ;"),
        (((" a", fp8),), "space around it"),
        ((("a", "fp8"),), "Recipe.parse takes strings"),
    ):
        with pytest.raises(ValueError, match=message):
            Policy(rules)
