import sys, time, traceback, torch
from tests.hf.test_mixers import *
for n in sys.argv[1:]:
    t=time.time()
    try:
        got,want=runs(n, deep_row())
        print(n, "logits %.1e grads %.1e"%(logit_error(got,want),gradient_error(got,want)), "%.1fs"%(time.time()-t),flush=True)
    except Exception as e:
        print(n, "ERR", type(e).__name__, str(e)[:300], flush=True); 
        if len(sys.argv)==2: traceback.print_exc()
