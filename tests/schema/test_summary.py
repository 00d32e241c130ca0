"""Text of the summaries that functions return."""

from natgrad.schema.summary import summary_lines


def test_entries_of_a_mapping_are_short_texts_of_their_kind():
    values = {"objective": {"evaluation": "unknown", "residual": 0.05234882189702224, "warnings": []}}
    assert "".join(summary_lines(values)) == ("objective  evaluation unknown, residual 0.0523488, warnings none\n")
