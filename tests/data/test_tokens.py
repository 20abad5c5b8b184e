"""Text needs a tokenizer, and who has none is told so in one way."""

import pytest

from chai_jax.data.tokens import require_tokenizer
from chai_jax.data.toy import toy_tokenizer
from chai_jax.errors import InputError


def test_a_tokenizer_that_is_there_is_handed_back() -> None:
    tokenizer = toy_tokenizer()
    assert require_tokenizer(tokenizer, "toy") is tokenizer


@pytest.mark.parametrize(("model", "name"), [("", "the model"), ("facebook/opt-125m", "facebook/opt-125m")])
def test_a_model_without_one_is_named(model: str, name: str) -> None:
    with pytest.raises(InputError, match=f"^{name} has no tokenizer, which text needs; expected tokenizer.json, or"):
        require_tokenizer(None, model)
