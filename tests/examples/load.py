"""A load generator for docs/examples/serve.py: clients in threads, each with a connection of its own.

``python load.py PORT CLIENTS SECONDS`` reads a line of JSON from standard input, ``{"profiles": [...], "texts":
[...]}``, and has each client post one request after another, profiles and texts in turn, for so many seconds or until
standard input ends. Then it prints a JSON line for each answer: ``[profile, text, status, seconds, answer]``.
"""

import http.client
import itertools
import json
import os
import sys
import threading
import time


def client(number: int, port: int, over: threading.Event, load: dict, found: list) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    for turn in itertools.count():
        if over.is_set():
            return
        profile = load["profiles"][(number * 7919 + turn) % len(load["profiles"])]
        text = load["texts"][(number + turn) % len(load["texts"])]
        body = json.dumps({"profile": profile, "text": text})
        start = time.perf_counter()
        connection.request("POST", "/classify", body, {"content-type": "application/json"})
        response = connection.getresponse()
        content = response.read()
        found.append([profile, text, response.status, time.perf_counter() - start, json.loads(content)])


def main() -> None:
    port, clients, seconds = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    load, found, over = json.loads(sys.stdin.readline()), [], threading.Event()
    threads = [threading.Thread(target=client, args=(number, port, over, load, found)) for number in range(clients)]
    for thread in threads:
        thread.start()
    threading.Thread(target=lambda: (os.read(0, 1), over.set()), daemon=True).start()
    over.wait(seconds)
    over.set()
    for thread in threads:
        thread.join()
    for line in found:
        print(json.dumps(line))


if __name__ == "__main__":
    main()
