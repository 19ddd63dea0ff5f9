from orchestrator import settings
def main():
    import os, uvicorn
    from orchestrator.app import create_app
    from orchestrator import log
    s=settings.load(os.environ); log.configure(s.log_level,s.log_format)
    uvicorn.run(create_app(s),host=s.host,port=s.port,access_log=False,log_config=None,loop="uvloop",http="httptools")
if __name__=="__main__": main()
