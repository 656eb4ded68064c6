"""Serve an ONNX export over HTTP: python serve_http.py EXPORT [--port 8000]. It needs onnxruntime and numpy.

curl localhost:8000/score -d '{"user": ["ann", "bob"], "price": [9.5, null]}'     ->  {"score": [0.31, 0.07]}
"""

import argparse
import json
import runpy
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

MAX_BYTES, MAX_ROWS, MAX_WAITING = 4 << 20, 4096, 64


def open_export(export: Path) -> tuple[list[str], Callable[[dict], list[float]]]:
    """The raw columns that an export's model.onnx reads, and what makes scores of them."""
    import onnxruntime

    encoder = runpy.run_path(str(export / "encode.py"))["Encoder"](export)
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # it takes cores from other requests
    session = onnxruntime.InferenceSession(str(export / "model.onnx"), options)
    return encoder.columns, lambda columns: session.run(["score"], encoder.graph_inputs(columns))[0].tolist()


def make_server(names: list[str], score: Callable[[dict], list[float]], port: int) -> ThreadingHTTPServer:
    """A server of the scores of rows with these columns, on the loopback; port 0 takes a free one."""
    places = threading.Semaphore(MAX_WAITING)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        timeout = 30  # of a connection that sends nothing
        wbufsize = -1  # headers and a short body leave in one packet
        disable_nagle_algorithm = True  # the last packet of a long one does not wait for the client

        def answer(self, status: int, body: dict) -> None:
            text = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def do_POST(self) -> None:
            size = int(self.headers.get("Content-Length") or 0)
            if self.path != "/score" or not 0 < size <= MAX_BYTES:
                self.close_connection = True  # what was sent is not read
                return self.answer(
                    404 if self.path != "/score" else 413, {"error": f"POST /score, at most {MAX_BYTES:,} bytes"}
                )
            body = self.rfile.read(size)
            if not places.acquire(blocking=False):
                return self.answer(503, {"error": "too many requests are waiting"})
            try:
                given = json.loads(body)
                columns = {name: given[name] for name in names}
                if not 0 < len(columns[names[0]]) <= MAX_ROWS or len({*map(len, columns.values())}) > 1:
                    raise ValueError(f"columns of equal length, 1 to {MAX_ROWS:,} rows")
                self.answer(200, {"score": score(columns)})
            except (KeyError, TypeError, ValueError) as error:
                self.answer(400, {"error": f"{type(error).__name__}: {error}", "columns": names})
            finally:
                places.release()

        def log_message(self, *args: object) -> None:
            pass

    return ThreadingHTTPServer(("127.0.0.1", port), Handler)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("export", type=Path)
    parser.add_argument("--port", type=int, default=8000)
    given = parser.parse_args()
    with make_server(*open_export(given.export), given.port) as server:
        print(f"serving {given.export} on http://127.0.0.1:{server.server_port}/score", flush=True)
        server.serve_forever()
