"""A ``sacct`` for a cluster without accounting: the controller's memory in sacct's format, all that submitit reads.

Answers ``sacct -o FIELD,... --parsable2 [-X] [-n] -j ID [-j ID ...]`` for as long as the controller remembers a job.
Steps are not listed: who needs to know of a step that ran out of memory finds ``DerivedExitCode``.
"""

from __future__ import annotations

import argparse
import subprocess
import sys

FIELDS = {
    "JobID": lambda job: job_id(job),
    "State": lambda job: job.get("JobState", ""),
    "NodeList": lambda job: job.get("NodeList", "").replace("(null)", ""),
    "ExitCode": lambda job: job.get("ExitCode", ""),
    "DerivedExitCode": lambda job: job.get("DerivedExitCode", ""),
    "Elapsed": lambda job: job.get("RunTime", ""),
    "Reason": lambda job: job.get("Reason", ""),
    "Restarts": lambda job: job.get("Restarts", ""),
}


def job_id(job: dict[str, str]) -> str:
    """``12``, ``12_3``, or ``12_[3-5%2]`` for tasks that still wait together."""
    if "ArrayJobId" not in job:
        return job["JobId"]
    task = job.get("ArrayTaskId", "")
    return f"{job['ArrayJobId']}_{task if task.isdigit() else f'[{task}]'}"


def jobs(number: str) -> list[dict[str, str]]:
    """Every job, or array task, of a job number; none if it is unknown."""
    command = ["scontrol", "--oneliner", "--details", "show", "job", number]
    answer = subprocess.run(command, capture_output=True, text=True)
    found = []
    for line in answer.stdout.splitlines():
        words = [word.partition("=") for word in line.split()]
        if line.startswith("JobId="):
            found.append({key: value for key, _, value in reversed(words)})  # the first of equal keys
    return found


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("-o", "--format", default="JobID,State,NodeList")
    parser.add_argument("-j", "--jobs", action="append", default=[])
    parser.add_argument("--parsable2", "-P", action="store_true", required=True)
    parser.add_argument("--allocations", "-X", action="store_true")  # there are no others
    parser.add_argument("--noheader", "-n", action="store_true")
    options = parser.parse_args()
    fields = options.format.split(",")
    lines = [] if options.noheader else ["|".join(fields)]
    for number in ",".join(options.jobs).split(","):
        lines += ["|".join(FIELDS[field](job) for field in fields) for job in jobs(number)]
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
