from vaekernels._command import importing, run

with importing():
    from vaekernels.bench import main

raise SystemExit(run(main))
