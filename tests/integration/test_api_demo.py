"""`make serve` from nothing: log in, upload a PDF, ask; and it touches nothing but its own folder."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx2

from src.demo import PASSWORD, USER
from tests.support import files

ROOT = Path(__file__).resolve().parent.parent.parent
START_SECONDS = 240
ELSEWHERE = {
    "DATABASE_URL": "postgresql://nobody@127.0.0.1:1/production",
    "DATABASE_ADMIN_URL": "postgresql://nobody@127.0.0.1:1/production",
    "UPLOAD_DIR": "/nowhere/uploads",
    "FAISS_INDEX_PATH": "/nowhere/faiss_index",  # migration
    "SECRET_KEY": "",
}


def free_port() -> int:
    with socket.socket() as asked:
        asked.bind(("127.0.0.1", 0))
        return int(asked.getsockname()[1])


def test_a_question_is_answered_from_an_own_pdf_on_a_machine_with_nothing_set_up(
    server_folder: Path,
) -> None:
    port, folder = free_port(), server_folder / "demo"
    process = subprocess.Popen(
        [sys.executable, "-m", "src.demo", "--folder", str(folder), "--port", str(port)],
        cwd=server_folder,
        env={**os.environ, **ELSEWHERE, "PYTHONPATH": f"{ROOT / 'backend'}:{ROOT}"},
        stderr=subprocess.STDOUT,
        stdout=subprocess.PIPE,
        text=True,
    )
    told: list[str] = []
    try:
        wait_for_line(process, "Application startup complete", told)
        with httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False) as client:
            assert ask_the_pdf(client)["file_name"] == "timetable.pdf"
        if shutil.which("curl"):
            assert "Gallery" in typed(server_folder, "".join(told))
    finally:
        process.send_signal(signal.SIGTERM)
        told.append(process.communicate(timeout=START_SECONDS)[0])
    assert "service.stop.done" in "".join(told)
    assert not (folder / "postgres" / "pgdata" / "postmaster.pid").exists()


def wait_for_line(process: subprocess.Popen[str], text: str, told: list[str]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        told.append(line)
        if text in line:
            return
    raise AssertionError("".join(told))


def typed(folder: Path, told: str) -> str:
    """What the last of the lines that it tells prints, copied into a shell with a file and a question of one's own."""
    (folder / "museum.pdf").write_bytes(files.pdf(["Gallery 4 shows the clocks; it is closed on Mondays."]))
    lines = "\n".join(line for line in told.splitlines() if line.startswith("  "))
    lines = lines.replace("your.pdf", "museum.pdf").replace("your question", "When is the gallery closed?")
    assert lines.count("curl") == 4
    shell = subprocess.run(["bash", "-euo", "pipefail", "-c", lines], cwd=folder, capture_output=True, text=True)
    assert shell.returncode == 0, shell.stderr
    return shell.stdout.splitlines()[-1]


def ask_the_pdf(client: httpx2.Client) -> Any:
    """The nearest passage; asked until the document is ready."""
    account = {"username": USER, "password": PASSWORD}
    token = client.post("/auth/login", json=account).json()["access_token"]
    client.headers["Authorization"] = f"Bearer {token}"
    pdf = files.pdf(["The night train to Zurich leaves from platform 9 at 22:40."])
    sent = {"file": ("timetable.pdf", pdf, "application/pdf")}
    document_id = client.post("/api/upload", files=sent).json()["document_id"]
    for _ in range(10_000):
        shown = client.get(f"/api/documents/{document_id}").json()
        if shown["status"] not in ("received", "indexing"):
            break
    assert shown["status"] == "ready", shown
    hits = client.get("/api/search", params={"q": "From which platform does the train leave?"}).json()
    assert "platform 9" in hits[0]["content"]
    return hits[0]
