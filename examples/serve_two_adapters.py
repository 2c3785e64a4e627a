"""Serve two adapters of one base, and ask both for one text.

From the top of the repository: python examples/serve_two_adapters.py adapters/imdb_small adapters/quickstart
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from urllib.request import Request, urlopen

parser = argparse.ArgumentParser(
    description="Serve adapters of one base, and ask each for one text."
)
parser.add_argument("adapters", nargs="+", type=Path)
folders = parser.parse_args().adapters
command = [sys.executable, "-m", "lora_sentiment", "serve", *folders, "--port", "0"]
server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
try:
    address = ""
    while "http://" not in address:
        address = server.stdout.readline()
        if not address:
            sys.exit("the server ended; see its message")
    address = address[address.index("http://") :].split()[0]
    for folder in folders:
        body = json.dumps({"texts": ["A lovely film."], "adapter": folder.name}).encode()
        request = Request(f"{address}/predict", body, {"Content-Type": "application/json"})
        with urlopen(request, timeout=60) as response:
            (prediction,) = json.load(response)["predictions"]
        print(folder.name, prediction["label"], f"{prediction['score']:.2f}")
finally:
    server.terminate()
    server.wait()
