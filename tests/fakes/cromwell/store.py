"""What Cromwell keeps in its database: the workflow store, metadata events, their summary, and job ids.

Metadata reaches the database in batches, and what the REST interface recognises, finds by label and calls a status
comes from a summary of those batches that is made later still. From this follow the seconds in which a new workflow
is unknown, the lag of a status behind metadata, and what a crash loses.
"""

from __future__ import annotations

import json
import sqlite3
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

HOG_GROUP_MAX = 100  # characters, the width of the column
# A later state wins over an earlier one; nothing wins over a final one.
RANK = {"On Hold": 0, "Submitted": 1, "Running": 2, "Aborting": 3, "Aborted": 4, "Failed": 4, "Succeeded": 4}

_SCHEMA = """
CREATE TABLE IF NOT EXISTS workflow (seq INTEGER PRIMARY KEY, id TEXT UNIQUE, state TEXT, hog_group TEXT, source TEXT,
    inputs TEXT, options TEXT, labels TEXT, heartbeat REAL);
CREATE TABLE IF NOT EXISTS metadata (seq INTEGER PRIMARY KEY, id TEXT, call TEXT, attempt INTEGER, key TEXT,
    value TEXT);
CREATE INDEX IF NOT EXISTS metadata_id ON metadata (id);
CREATE TABLE IF NOT EXISTS summary (seq INTEGER PRIMARY KEY, id TEXT UNIQUE, status TEXT, name TEXT, submission TEXT,
    start TEXT, end TEXT);
CREATE TABLE IF NOT EXISTS label (id TEXT, key TEXT, value TEXT, PRIMARY KEY (id, key));
CREATE INDEX IF NOT EXISTS label_pair ON label (key, value);
CREATE TABLE IF NOT EXISTS job (id TEXT, attempt INTEGER, job_id TEXT, PRIMARY KEY (id, attempt));
CREATE TABLE IF NOT EXISTS summarized (seq INTEGER);
"""


class Event(NamedTuple):
    """One piece of metadata; `call` is "" for the workflow itself."""

    workflow: str
    key: str
    value: Any
    call: str = ""
    attempt: int = 0


@dataclass(frozen=True)
class Workflow:
    """A row of the workflow store: it lives from the POST to the end of the workflow."""

    id: str
    state: str
    hog_group: str
    source: str
    inputs: str
    options: str
    labels: dict[str, str]


class Refused(Exception):
    """The submission is refused with this message, as the database words it where `database` is true."""

    def __init__(self, message: str, database: bool = False) -> None:
        super().__init__(message)
        self.database = database


def timestamp(at: float | None = None) -> str:
    moment = datetime.fromtimestamp(time.time() if at is None else at, UTC)
    return moment.strftime("%Y-%m-%dT%H:%M:%S.") + f"{moment.microsecond // 1000:03}Z"


class Store:
    """One SQLite file; every method may be called by any thread."""

    def __init__(self, path: Path, write_delay: bool = False, batch: int = 200) -> None:
        self._lock = threading.RLock()
        self._db = sqlite3.connect(path, check_same_thread=False)
        self._db.row_factory = sqlite3.Row
        self._db.executescript("PRAGMA journal_mode=WAL; PRAGMA synchronous=OFF;" + _SCHEMA)
        self._write_delay = write_delay
        self._batch = batch
        self._pending: list[Event] = []

    def _rows(self, sql: str, values: Sequence[Any] = ()) -> list[sqlite3.Row]:
        with self._lock:
            return self._db.execute(sql, values).fetchall()

    def _write(self, sql: str, values: Sequence[Any] = ()) -> int:
        with self._lock:
            count = self._db.execute(sql, values).rowcount
            self._commit()
            return count

    def _commit(self) -> None:
        if not self._write_delay:
            self._db.commit()

    def commit(self) -> None:
        """End a write delay: a crash loses what came after the last commit."""
        with self._lock:
            self._db.commit()

    def close(self) -> None:
        self.flush()
        with self._lock:
            self._db.commit()
            self._db.close()

    # -- workflow store --------------------------------------------------------------------------------------------

    def add(self, workflow: Workflow) -> None:
        """Raises Refused when the id is in use, at once or in a race, or the hog group is too long to store."""
        if self.get(workflow.id) or self.recognised(workflow.id):
            raise Refused(f"Requested workflow IDs are already in use: {workflow.id}")
        if len(workflow.hog_group) > HOG_GROUP_MAX:
            raise Refused(
                "data exception: string data, right truncation ;  table: WORKFLOW_STORE_ENTRY column: HOG_GROUP", True
            )
        row = [*{**vars(workflow), "labels": json.dumps(workflow.labels)}.values(), None]
        try:
            self._write(
                "INSERT INTO workflow (id, state, hog_group, source, inputs, options, labels, heartbeat)"
                " VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                row,
            )
        except sqlite3.IntegrityError as error:
            raise Refused(
                "integrity constraint violation: unique constraint or index violation; UC_WORKFLOW_STORE_ENTRY_WEU "
                "table: WORKFLOW_STORE_ENTRY",
                True,
            ) from error

    @staticmethod
    def _workflow(row: sqlite3.Row) -> Workflow:
        fields = {name: row[name] for name in ("id", "state", "hog_group", "source", "inputs", "options")}
        return Workflow(**fields, labels=json.loads(row["labels"]))

    def get(self, workflow: str) -> Workflow | None:
        rows = self._rows("SELECT * FROM workflow WHERE id = ?", [workflow])
        return self._workflow(rows[0]) if rows else None

    def change(self, workflow: str, old: Iterable[str], new: str) -> bool:
        """Set the state if it is one of `old`; whether it was."""
        states = list(old)
        marks = ",".join("?" * len(states))
        sql = f"UPDATE workflow SET state=? WHERE id=? AND state IN ({marks})"
        return self._write(sql, [new, workflow, *states]) > 0

    def remove(self, workflow: str, states: Iterable[str] = RANK) -> bool:
        """Delete the row if its state is one of `states`; whether it was."""
        names = list(states)
        marks = ",".join("?" * len(names))
        return self._write(f"DELETE FROM workflow WHERE id=? AND state IN ({marks})", [workflow, *names]) > 0

    def pick_up(self, count: int, ttl_seconds: float) -> list[Workflow]:
        """Up to `count` workflows of one hog group: the one with the fewest at work, the oldest first.

        Workflows of a process that has not been heard of for the ttl are taken over in the state they had.
        """
        now, stale = time.time(), time.time() - ttl_seconds
        with self._lock:
            free = "state != 'On Hold' AND (heartbeat IS NULL OR heartbeat < ?)"
            groups = self._rows(
                f"SELECT hog_group FROM workflow w WHERE {free} GROUP BY hog_group ORDER BY (SELECT count(*)"
                " FROM workflow b WHERE b.hog_group = w.hog_group AND b.heartbeat >= ?), min(seq) LIMIT 1",
                [stale, stale],
            )
            if not groups:
                return []
            rows = self._rows(
                f"SELECT * FROM workflow WHERE {free} AND hog_group = ? ORDER BY seq LIMIT ?",
                [stale, groups[0]["hog_group"], count],
            )
            for row in rows:
                self._write(
                    "UPDATE workflow SET heartbeat=?, state=replace(state, 'Submitted', 'Running') WHERE id=?",
                    [now, row["id"]],
                )
            return [self._workflow(row) for row in rows]

    def beat(self, workflows: Iterable[str], at: float | None) -> None:
        """Write the heartbeat of these workflows; None releases them for the next process."""
        for workflow in workflows:
            self._write("UPDATE workflow SET heartbeat=? WHERE id=?", [at, workflow])

    def aborting(self) -> list[str]:
        return [row["id"] for row in self._rows("SELECT id FROM workflow WHERE state='Aborting'")]

    # -- job ids ---------------------------------------------------------------------------------------------------

    def set_job(self, workflow: str, attempt: int, job_id: str) -> None:
        self._write("INSERT OR REPLACE INTO job VALUES (?, ?, ?)", [workflow, attempt, job_id])

    def jobs(self, workflow: str) -> dict[int, str]:
        """Attempt -> job id of what was already submitted for a workflow."""
        rows = self._rows("SELECT attempt, job_id FROM job WHERE id=?", [workflow])
        return {row["attempt"]: row["job_id"] for row in rows}

    # -- metadata --------------------------------------------------------------------------------------------------

    def put(self, *events: Event) -> None:
        with self._lock:
            self._pending += events
            if len(self._pending) >= self._batch:
                self.flush()

    def flush(self) -> None:
        """Write the pending metadata: what was not flushed is lost in a crash."""
        with self._lock:
            rows = [(e.workflow, e.call, e.attempt, e.key, json.dumps(e.value)) for e in self._pending]
            self._pending = []
            if rows:
                sql = "INSERT INTO metadata (id, call, attempt, key, value) VALUES (?, ?, ?, ?, ?)"
                self._db.executemany(sql, rows)
                self._commit()

    def events(self, workflow: str) -> list[Event]:
        rows = self._rows("SELECT * FROM metadata WHERE id=? ORDER BY seq", [workflow])
        return [Event(r["id"], r["key"], json.loads(r["value"]), r["call"], r["attempt"]) for r in rows]

    def summarize(self) -> None:
        with self._lock:
            last = self._rows("SELECT max(seq) AS seq FROM summarized")[0]["seq"] or 0
            rows = self._rows("SELECT * FROM metadata WHERE seq > ? AND call = '' ORDER BY seq", [last])
            for row in rows:
                self._summarize(row["id"], row["key"], json.loads(row["value"]))
            if rows:
                self._db.execute("INSERT INTO summarized VALUES (?)", [rows[-1]["seq"]])
                self._commit()

    def _summarize(self, workflow: str, key: str, value: Any) -> None:
        self._db.execute("INSERT OR IGNORE INTO summary (id) VALUES (?)", [workflow])
        if key.startswith("labels:"):
            self._db.execute("INSERT OR REPLACE INTO label VALUES (?, ?, ?)", [workflow, key[7:], value])
        elif key == "status":
            old = self._db.execute("SELECT status FROM summary WHERE id=?", [workflow]).fetchone()["status"]
            if old is None or RANK[value] >= RANK[old] < RANK["Aborted"]:
                self._db.execute("UPDATE summary SET status=? WHERE id=?", [value, workflow])
        elif key in ("submission", "start", "end", "workflowName"):
            column = {"workflowName": "name"}.get(key, key)
            self._db.execute(f"UPDATE summary SET {column}=coalesce({column}, ?) WHERE id=?", [value, workflow])

    # -- summary ---------------------------------------------------------------------------------------------------

    def recognised(self, workflow: str) -> bool:
        return bool(self._rows("SELECT 1 FROM summary WHERE id=? AND status IS NOT NULL", [workflow]))

    def status(self, workflow: str) -> str:
        return str(self._rows("SELECT status FROM summary WHERE id=?", [workflow])[0]["status"])

    def labels(self, workflow: str) -> dict[str, str]:
        return {row["key"]: row["value"] for row in self._rows("SELECT key, value FROM label WHERE id=?", [workflow])}

    def query(self, where: str, values: Sequence[Any], limit: int, offset: int) -> tuple[list[sqlite3.Row], int]:
        """Summary rows, newest first, and how many there are in all."""
        base = f"FROM summary s WHERE status IS NOT NULL AND {where}"
        rows = self._rows(f"SELECT * {base} ORDER BY seq DESC LIMIT ? OFFSET ?", [*values, limit, offset])
        return rows, int(self._rows(f"SELECT count(*) AS n {base}", values)[0]["n"])
