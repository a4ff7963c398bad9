"""Files of rows: JSON Lines, CSV, TSV and parquet, each as it is or gzipped. Bytes in, numbered rows out.

No reader guesses a value: "NA", "null" and an empty field of a CSV are the texts they are, and a number in a CSV is text.
What a reader cannot make a row of goes into `problems`, beside the number of the row. Rows are counted from 1, without a
header; in JSON Lines every line is a row.
"""

import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path

from tombola.errors import DataError
from tombola.tasks.checks import Problems, near

Row = dict[str, object]
Reader = Callable[[bytes, Collection[str], Problems], Iterator[tuple[int, Row]]]

BOM = b"\xef\xbb\xbf"


def read_rows(path: Path, columns: Collection[str], problems: Problems) -> Iterator[tuple[int, Row]]:
    """(number, row) of every row of the file that can be read; the others go into `problems`. `columns` are those wanted.

    Raises: DataError for a file that cannot be read at all, or of another kind.
    """
    kind = kind_of(path)
    try:
        raw = path.read_bytes()
        content = gzip.decompress(raw) if path.suffix.lower() == ".gz" else raw
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"{path} cannot be read: damaged, cut short or no gzip file",
            got=f"{type(error).__name__}: {error}",
            next="fetch the file again",
        ) from error
    return READERS[kind](content, columns, problems)


def kind_of(path: Path) -> str:
    """The ending that says how a file is read. Raises: DataError for one that no reader has."""
    name = path.name.lower().removesuffix(".gz")
    kind = next((kind for kind in READERS if name.endswith(kind)), None)
    if kind is None:
        raise DataError(
            f"{path} is of no kind that can be read",
            got=path.name,
            expected=f"a file that ends in {', '.join(READERS)}, each also with .gz",
            next="one JSON object a line is .jsonl" if ".json" in name else None,
        )
    return kind


def _jsonl(content: bytes, columns: Collection[str], problems: Problems) -> Iterator[tuple[int, Row]]:
    content = content.removeprefix(BOM)
    for number, line in enumerate(content.removesuffix(b"\n").split(b"\n") if content else (), start=1):
        try:
            row = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError:
            fault = "not UTF-8"
        except (ValueError, RecursionError) as error:  # ValueError: no JSON, or a number of thousands of digits
            fault = f"not valid JSON ({getattr(error, 'msg', 'nested too deep or a number too long')})"
        else:
            if isinstance(row, dict):
                yield number, row
                continue
            fault = "not a JSON object"
        problems.setdefault(fault, []).append(number)


def _csv(content: bytes, columns: Collection[str], problems: Problems) -> Iterator[tuple[int, Row]]:
    """Comma, or semicolon where only that gives a header with the columns wanted; quoted as `csv` quotes."""
    text = _decoded(content, problems)
    if text is None:
        return iter(())
    delimiter = next((mark for mark in ",;\t" if set(columns) <= set(_header(text, mark))), ",")
    records, faults = _records(text, delimiter, csv.QUOTE_MINIMAL)
    return _rows(records, faults, problems)


def _tsv(content: bytes, columns: Collection[str], problems: Problems) -> Iterator[tuple[int, Row]]:
    """Tabs. Published TSV files hold bare quotation marks more often than quoted fields: a reading in which quotes mean
    nothing is taken when it has no fault and the quoted one has, or would make one row of several."""
    text = _decoded(content, problems)
    if text is None:
        return iter(())
    quoted, plain = _records(text, "\t", csv.QUOTE_MINIMAL), _records(text, "\t", csv.QUOTE_NONE)
    better = not plain[1] and (bool(quoted[1]) or len(quoted[0]) != len(plain[0]))
    return _rows(*(plain if better else quoted), problems)


def _decoded(content: bytes, problems: Problems) -> str | None:
    try:
        return content.removeprefix(BOM).decode("utf-8")
    except UnicodeDecodeError as error:
        problems[f"not UTF-8 (line {content[: error.start].count(10) + 1})"] = []
        return None


def _header(text: str, delimiter: str) -> list[str]:
    try:
        return next(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True), [])
    except csv.Error:
        return []


def _records(text: str, delimiter: str, quoting: int) -> tuple[list[list[str]], Problems]:
    """All records, header first, and what is wrong with them; reading ends where `csv` gives up."""
    faults: Problems = {}
    records: list[list[str]] = []
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True, quoting=quoting)  # type: ignore[arg-type]
    try:
        for record in reader:
            records.append(record)
            if len(record) != len(records[0]):
                faults.setdefault(f"other than {_fields(len(records[0]))}, as the header has", []).append(len(records) - 1)
    except csv.Error as error:
        faults[f"not readable as CSV from here on ({error})"] = [len(records)]
    return records, faults


def _fields(n: int) -> str:
    return f"{n} field" if n == 1 else f"{n} fields"


def _rows(records: list[list[str]], faults: Problems, problems: Problems) -> Iterator[tuple[int, Row]]:
    header = records[0] if records else []
    if twice := [name for name in dict.fromkeys(header) if name and header.count(name) > 1]:
        problems[f"the header names {', '.join(map(repr, twice))} twice"] = []
    if not header and (records or not faults):  # without one, the lengths of the rows say nothing
        problems["no header line with the names of the columns"] = []
        return
    problems |= faults
    for number, record in enumerate(records[1:], start=1):
        if len(record) == len(header):
            yield number, dict(zip(header, record, strict=True))


def _parquet(content: bytes, columns: Collection[str], problems: Problems) -> Iterator[tuple[int, Row]]:
    import pyarrow  # type: ignore[import-untyped]
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(io.BytesIO(content))
        names = file.schema_arrow.names
        there = f"columns there: {', '.join(names) or 'none'}"
        if lacking := [name for name in columns if name not in names]:
            problems |= {f"no column {name!r} ({there}){near(name, names)}": [] for name in lacking}
            return
        table = file.read(columns=list(dict.fromkeys(columns)))
        singles = [field.name for field in table.schema if pyarrow.types.is_float32(field.type)]
        rows: list[Row] = table.to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        problems[f"not readable as parquet ({type(error).__name__}: {str(error).partition(chr(10))[0][:120]})"] = []
        return
    for number, row in enumerate(rows, start=1):
        yield number, row | {name: shortest(row[name]) for name in singles}


def shortest(value: object) -> object:
    """A float that was stored with 32 bits as the shortest number that is stored so: 3.8, not 3.799999952316284."""
    import numpy as np

    return float(str(np.float32(value))) if isinstance(value, float) else value


# ending → how such a file is read
READERS: Mapping[str, Reader] = {".jsonl": _jsonl, ".csv": _csv, ".tsv": _tsv, ".parquet": _parquet}
