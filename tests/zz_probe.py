import re
from test_mesh import *
def test_p():
    for mesh in (MIXED,"fsdp:8"):
        for p in ("fp8","bf16"):
            print(mesh,p,sorted(collections.Counter(re.findall(r"= (\w+\[[\d,]*\])\S* all-gather\(.*?(replica_groups=\S*)", after(mesh,p)[2])).items()))
    print(CONFIG)
