"""A table as an Excel file, with the extra `eval`."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import Any

from manifests.errors import UserError

ILLEGAL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f]")


def xlsx(header: Sequence[str], rows: Sequence[Sequence[str | int | None]]) -> bytes:
    """Return an Excel file of one sheet. None is an empty cell; text is never a formula.

    Control characters, which such a file cannot hold, become blanks.
    Raises: UserError when openpyxl is not installed.
    """
    book = _workbook()
    sheet = book.active
    for row_no, row in enumerate([header, *rows], start=1):
        for column_no, value in enumerate(row, start=1):
            _write(sheet.cell(row_no, column_no), value)
    written = io.BytesIO()
    book.save(written)
    return written.getvalue()


def _write(cell: Any, value: str | int | None) -> None:
    if not isinstance(value, str):
        cell.value = value
        return
    cell.value = ILLEGAL.sub(" ", value)
    cell.data_type = "s"  # else "=.." is a formula


def _workbook() -> Any:
    try:
        from openpyxl import Workbook
    except ImportError as error:
        raise UserError(
            "An Excel file cannot be written: openpyxl is not installed.",
            str(error),
            'Install it: pip install "warren[eval]".',
        ) from error
    return Workbook()
