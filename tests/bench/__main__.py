"""Print the table of every benchmark."""

from tabulate import tabulate

from tests.bench import attention, core, data, fits, orchestration, parts, slots, store, trainer

for benchmark in (trainer, parts, attention, data, fits, core, orchestration, slots, store):
    print(f"\n{(benchmark.__doc__ or '').splitlines()[0]}\n")
    print(tabulate(benchmark.rows(), headers=benchmark.HEADERS, floatfmt=",.1f"))
