"Gate: do readers trained on the new wordings name the topic of held-out ones?"
import sys, random, time, re; sys.path.insert(0,'.')
import corpus as C, pathlib, numpy as np, torch
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
W=pathlib.Path('wordings'); T=C.topics()
new={t['name']:[l.strip() for l in (W/f"{t['name']}.txt").read_text().splitlines() if l.strip()] if (W/f"{t['name']}.txt").exists() else [] for t in T}
ho=C.held_out_questions()
train=[(q,i) for i,t in enumerate(T) for q in t['questions'][:-2]+new[t['name']] if q not in ho]
test=[(q,i) for i,t in enumerate(T) for q in t['questions'][-2:]]
print(sum(map(len,new.values())), 'new; overlap', sum(q in ho for v in new.values() for q in v), 'train',len(train),'test',len(test))
frames=[]
rng=random.Random(0)
for i,t in enumerate(T):
    for f in C.CUES+C.ASK_ABOUT+C.ASK:
        for _ in range(3): frames.append((C.Filler(rng,{},t)(f),i))
if __name__=='__main__':
    for name,extra in (('wordings',[]),('wordings+frames',frames)):
        d=train+extra
        for rngm,ng in (('word',(1,1)),('word',(1,2)),('char_wb',(2,5))):
            v=TfidfVectorizer(sublinear_tf=True,analyzer=rngm,ngram_range=ng,min_df=1); X=v.fit_transform([q for q,_ in d]); m=LogisticRegression(C=20,max_iter=60).fit(X,[i for _,i in d])
            p=m.predict(v.transform([q for q,_ in test])); y=np.array([i for _,i in test]); print(name,rngm,ng,round((p==y).mean(),3),flush=True)
    for (q,i),g in zip(test,p):
        if g!=i: print('  ',T[i]['name'],'->',T[g]['name'],'|',q)
