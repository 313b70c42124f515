"""
Local copies: what a pod has of a save on a disk of its own node, before the save is on storage.

Called from: the executor, which writes, uploads and loads them. The supervisor knows them by their names alone.
"""
