import resource
import subprocess
import sys

TOUCH = """
import resource, sys
from rlkit.workers.memory import keep_freed_memory

if sys.argv[1] == "keep":
    assert keep_freed_memory()

def faults_of_a_step():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    buffers = [b"x" * (1 << 26) for _ in range(4)]
    del buffers
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults_of_a_step()
print(faults_of_a_step())
"""


def faults(how: str) -> int:
    done = subprocess.run([sys.executable, "-c", TOUCH, how], capture_output=True, text=True, check=True)
    return int(done.stdout)


def test_a_second_step_finds_the_memory_of_the_first():
    num_pages = 4 * (1 << 26) // resource.getpagesize()
    assert faults("keep") < 0.01 * num_pages
    assert faults("give back") > 10 * faults("keep")  # when this fails, the allocator keeps them by itself: remove the module
