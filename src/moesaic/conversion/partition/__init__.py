"""Partitions: which neuron of a dense FFN goes to which expert.

Renumbering the neurons of an FFN changes nothing it computes, so any order may be chosen before its
matrices are cut into equal blocks. `_table.py` lists the methods; this package imports none.
"""
