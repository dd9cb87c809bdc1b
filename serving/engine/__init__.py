"""The step loop: schedule, run, sample, emit. Runs without Ray and without HTTP."""
