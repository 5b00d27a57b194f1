"""Reports: rows become tables and charts.

manifest   what a table asks for, read from `configs/table`
cells      one run of a table: its command, its row, what changed since
protocol   which rows may stand in one column
spread     which differences between two lines count
costs      what runs cost, from the figures of a script
progress   how far a cell is, told by the files of its run
claims     the paper's claims: holds, does not hold, can't tell
second     metrics beside the Frechet distance
columns    cells -> the texts of a table, with column_notes below it
render     texts -> Markdown and LaTeX
charts     distance over bits
pages      a measurement of a script -> JSON and Markdown
"""
