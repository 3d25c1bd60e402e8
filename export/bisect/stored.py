def compare_stored(*a):
    return []
