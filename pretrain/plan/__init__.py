"""What will a run cost in memory, time and money?"""
