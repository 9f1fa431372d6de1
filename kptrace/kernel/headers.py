import sys
sys.path.insert(0, "/work/shared/prototypes")
def write_tree(root, *, machine, release, page_size):
    import kheaders
    return kheaders.write_tree()
