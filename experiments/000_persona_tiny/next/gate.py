"Gate 2: the warm-up itself, judged on held-out questions and mischief"
import sys, time; sys.path.insert(0,'.')
import random, torch, corpus as C, train as t
a=t.parse(sys.argv[1:]); torch.set_num_threads(a.threads); torch.manual_seed(0)
rng=random.Random(3)
t0=time.time(); conv=[C.conversation(rng) for _ in range(20000)]
tok=t.train_tokenizer((m['content'] for c in conv for m in c), a.vocab); print('tok',time.time()-t0)
model=t.new_model(tok,a); reader=t.TopicReader(a.width,max(a.full_layers),.3)
names=t.subjects(); role={r:tok.convert_tokens_to_ids(f'<|{r}|>') for r in t.ROLES}
test=[(q,x['name']) for x in C.topics() for q in x['questions'][-2:]]
mis=[(f.format(act=i['act']),C.MISCHIEF) for i in C.split(C.mischief(),True,len(C.mischief())//8) for f in C.ASK]
harmless=[(rng.choice(C.ASK).format(act=act),x['name']) for x in C.topics() for act in x['act']]
@torch.no_grad()
def acc(items, quiet=True):
    good=[]
    with t.first_blocks(model,reader.block+1) as b:
        for q,n in items:
            ids=torch.tensor([[role['user'],*tok(q,add_special_tokens=False).input_ids,tok.eos_token_id,role['assistant']]])
            h=b(ids,use_cache=False).last_hidden_state[0,-1]
            good.append((names[int(reader(t.rms_norm(h,h.shape[-1:])).argmax())],n,q))
    return sum(g==n for g,n,_ in good)/len(good),good
t0=time.time()
for e in (a.reading,):
    t.learn_to_read(model,tok,reader,e); print('seconds',round(time.time()-t0))
    for k,items in (('held-out',test),('mischief',mis),('harmless',harmless)):
        r,g=acc(items); print(k,round(r,3),len(items))
        for x in g:
            if x[0]!=x[1] and k!='harmless': print('   ',x)
