"""Print every area's table."""

from tabulate import tabulate

from tests.bench import attention, core, data, fits, orchestration, parts, slots, store, trainer

for area in (trainer, parts, attention, data, fits, core, orchestration, slots, store):
    print(f"\n{(area.__doc__ or '').splitlines()[0]}\n")
    print(tabulate(area.rows(), headers=area.HEADERS, floatfmt=",.1f"))
