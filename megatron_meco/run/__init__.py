"""Runs described by one file: `meco train`, `meco watch`, and what reads their files.

`run_file` reads a run file, `flag_table` knows the flags, `presets` the models, `launch` makes the
command, `training_log` and `endings` read what a run prints. Nothing here needs torch or Megatron
but `flag_table.read_parser` and `check`, which run in processes of their own.
"""
