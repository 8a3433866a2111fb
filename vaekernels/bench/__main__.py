from vaekernels.bench import main

raise SystemExit(main())
