"""Triton kernels and their launchers. Nothing else imports triton.

A kernel knows slots: it reads what a slot has from a `Board`, and which rows are whose from a table of tiles. None of
its arguments is an address of a delta's, so a captured graph stays right when deltas come and go.
"""
