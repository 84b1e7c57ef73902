"""From raw documents to Megatron files with metadata.

`prepare` writes `PREFIX.bin/.idx` and `PREFIX.metadata.arrow`; `metadata` and `url` read them back
without torch. Importing this package loads nothing: Megatron alone takes seconds to import, and
worker processes and the planning code never need it.
"""
