"""Valid files with random changes are read, refused or quarantined: no reader hangs, crashes or fills the memory.

FUZZ_CASES is the number of changed files of each target, FUZZ_SEED the seed of the changes, which a failure names.
"""

import os
import random
from pathlib import Path

import pytest
from hostile import read_all

from fuzz.mutations import mutate
from fuzz.targets import TARGETS, Target

CASES = int(os.environ.get("FUZZ_CASES", "100"))
SEED = int(os.environ.get("FUZZ_SEED", random.SystemRandom().randrange(2**32)))


def change_one(target: Target, folder: Path, chosen: random.Random) -> None:
    """Change one of the files that a target has in a folder."""
    file = chosen.choice(sorted(file for file in folder.rglob(target.changed) if file.is_file()))
    data = mutate(file.read_bytes(), chosen, target.tokens)
    if target.repair and chosen.random() < 0.5:
        data = target.repair(data)
    file.write_bytes(data)


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_changed_files_are_read_or_refused(tmp_path, name):
    target, paths = TARGETS[name], []
    for case in range(CASES):
        folder = tmp_path / str(case)
        folder.mkdir()
        paths.append(target.make(folder))
        if case:  # the first stays as it is
            change_one(target, folder, random.Random(f"{SEED} {name} {case}"))
    found = read_all(target.reader, paths)
    failed = [f"{outcome.path}: {outcome.detail}" for outcome in found if outcome.kind == "failed"]
    counts = {kind: sum(outcome.kind == kind for outcome in found) for kind in ("read", "refused", "failed")}
    print(f"{name}: {counts} (FUZZ_SEED={SEED})")
    assert len(found) == CASES and found[0].kind == "read", found[0]
    assert not failed, f"FUZZ_SEED={SEED}\n" + "\n".join(failed)
