"""Runs a study in parts: each run measures for some minutes, and goes on where the last one ended.

A study is a module, whose docstring ends with the method, with

    IDENTITY                     fields that tell its records apart
    MARGIN                       seconds that the longest measurement takes
    add_options(parser)          options of its own
    begin(results)               measures what all records need
    missing(arguments, results)  the work left: objects with `record`, what identifies it, and
                                 `parts`, what can be compiled ahead
    measure(work, results, compiled) -> Record
    line(record), tables(result), plots(result, folder), which returns files by caption
"""

import argparse
import json
import sys
import time
from pathlib import Path
from types import ModuleType

import torch
from compiling import PeerRun, wait
from measuring import Results, describe_device, today

from neighborhood_attention.tune.ahead import Ahead
from neighborhood_attention.tune.records import Deadline


def main(study: ModuleType) -> Results | None:
    """The study's command: measure what is missing, or only draw; print the tables."""
    arguments = parse(study, sys.argv[1:])
    if arguments.draw:
        result = json.loads(arguments.output.read_text())
        print(study.tables(result))
        arguments.draw.mkdir(parents=True, exist_ok=True)
        study.plots(result, arguments.draw)
        return None
    deadline = Deadline(arguments.limit_seconds)
    with torch.cuda.stream(torch.cuda.Stream()):
        results = run(study, arguments, deadline)
    print(study.tables(results.content | {"results": results.records}))
    return results


def parse(study: ModuleType, words: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=study.__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--commit", help="of the code that is measured")
    parser.add_argument("--limit-seconds", type=float, default=530, help="of this run")
    parser.add_argument("--draw", type=Path, metavar="FOLDER", help="measure nothing")
    study.add_options(parser)
    arguments = parser.parse_args(words)
    if arguments.commit is None and arguments.draw is None:
        parser.error("--commit is required")
    return arguments


def run(study: ModuleType, arguments: argparse.Namespace, deadline: Deadline) -> Results:
    """Measure until all is done or the time is over."""
    description = describe_device() | {
        "commit": arguments.commit,
        "date": today(),
        "method": " ".join(study.__doc__.split("\n\n")[-1].split()),
    }
    results = Results(arguments.output, description, study.IDENTITY)
    work = list(study.missing(arguments, results))
    study.begin(results)
    parts = [part for item in work for part in item.parts]
    # They run on the GPU: nothing is timed beside them.
    peers = [part for part in parts if isinstance(part, PeerRun)]
    with Ahead([*peers, *parts]) as ahead:
        for number, item in enumerate(work):
            try:
                for peer in peers:
                    wait(ahead, peer, deadline)
                compiled = {part: wait(ahead, part, deadline) for part in item.parts}
            except TimeoutError:
                compiled = None
            if compiled is None or deadline.left < study.MARGIN:
                print(f"time is over, {len(work) - number} measurements left: run this again")
                break
            begin = time.monotonic()
            try:
                results.add(item.record | study.measure(item, results, compiled))
            except RuntimeError as error:  # the next run shall not meet it again
                results.add(item.record | {"failures": {"GPU": str(error)[:200]}})
                raise
            seconds = time.monotonic() - begin
            print(f"{study.line(results.find(item.record))} | in {seconds:.1f} s", flush=True)
    return results
