"""All jobs by name."""

from __future__ import annotations

from tests.compile_check.drafting import drafting_jobs
from tests.compile_check.jobs import Job
from tests.compile_check.kernels import kernel_jobs
from tests.compile_check.must_fail import must_fail_jobs
from tests.compile_check.steps import step_jobs


def all_jobs(*, full: bool, drafts: bool = True) -> list[Job]:
    """Steps first, which take longest; `drafts`: those of draft models and heads as well."""
    return step_jobs(full=full) + (drafting_jobs(full=full) if drafts else []) + kernel_jobs() + must_fail_jobs()


def key(job: Job) -> str:
    """What a job is called on the command line: its name and its target."""
    return f"{job.name} on {job.target.name}"


def find(name: str, *, full: bool) -> Job:
    """The job of that key."""
    jobs = {key(job): job for job in all_jobs(full=full)}
    if name not in jobs:
        raise ValueError(f"no such job: {name!r}")
    return jobs[name]
