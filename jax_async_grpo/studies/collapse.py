"""Study: where training under lag stops working, for every loss and for control of the step (in progress)."""
def summary(rows, config, sources): return {}
def page(summary): return "in progress"
def figures(rows, summary, folder): return []
