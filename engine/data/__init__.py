"""Data sets: dataset_info.json, files of any format read row by row, rows in canonical form, checks, uploads."""
