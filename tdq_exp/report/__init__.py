"""Reports: rows become tables, charts and one page.

manifest, figure_manifest      what a table or a figure asks for, read from `configs`
cells, cell_states             one run of a table: its command, its row; how far it is
compared, contents             what a row and its cell must share: settings, networks, images
protocol                       which rows may stand in one column
spread                         which differences between two lines count
costs                          what runs cost, from the figures of a script
judged_claims                  the paper's claims: holds, does not hold, can't tell
second                         metrics beside the Frechet distance
columns, column_notes          cells -> the texts of a table, and what is said below it
text_tables                    texts -> Markdown and LaTeX
paired_rank                    how well a distance that takes seconds ranks runs
charts, drawings, axes         pictures: of rows, and of the numbers of figures
figure_numbers                 those numbers, as files
pages                          a measurement of a script -> JSON and Markdown
page, page_figures, page_rows  the page of all results, in HTML
page_markdown, page_style      its tables, its looks
"""
