"""docs/families.md says what runs."""

import families_page


def test_the_page_is_true():
    assert families_page.PAGE.read_text(encoding="utf-8") == families_page.page()
