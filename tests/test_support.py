"""docs/support.md says what the registry and the tests say."""

from tests.support import PAGE, page


def test_the_support_matrix_is_not_stale() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "stale: run `python -m tests.support`"
