"""Checks of types that local functions share."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from beartype.roar import BeartypeCallHintViolation
from jaxtyping import Float, TypeCheckError, jaxtyped

from tests.type_checks import checked


def stub(kind: Any) -> Any:
    def function(x: kind) -> None:
        pass

    return function


def test_functions_with_the_same_code_and_types_share_their_checks() -> None:
    assert checked(stub(int)) is checked(stub(int))
    checked(stub(str))("a")
    checked(stub(float))(1)
    for kind, wrong in ((int, "a"), (str, 1), (float, "a")):
        with pytest.raises(BeartypeCallHintViolation):
            checked(stub(kind))(wrong)


def test_functions_that_do_different_things_share_nothing() -> None:
    def constant(value: int) -> Callable[[], int]:
        def function() -> int:
            return value

        return checked(function)

    assert [constant(value)() for value in (1, 2)] == [1, 2]
    for default in (1, 2, [3]):  # a list has no hash

        def function(x: Any = default) -> Any:
            return x

        assert checked(function)() == default


def test_jaxtyping_checks_each_definition_of_a_local_function() -> None:
    def first_columns(count: int, x: np.ndarray) -> np.ndarray:
        @jaxtyped(typechecker=checked)
        def function(x: Float[np.ndarray, "n n"]) -> Float[np.ndarray, "n n"]:
            return x[:, :count]

        return function(x)

    square = np.ones((3, 3))
    for _ in range(2):
        np.testing.assert_array_equal(first_columns(3, square), square)
        with pytest.raises(TypeCheckError, match="return value"):
            first_columns(2, square)
        with pytest.raises(TypeCheckError, match="parameters"):
            first_columns(3, square[:2])
