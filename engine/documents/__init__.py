"""From documents to a reviewed set of questions and answers, by a model that is served on this machine.

document_reader   a document → headings and paragraphs, read in a limited process by
                  pdf_pages, word_text and plain_text
passages          headings and paragraphs → passages with their source
prompts, answers  what the model is asked, and what its answers say; support: an exact measure beside its judgement
generate          the process that asks it about each passage
drafts            the folder of a draft: making one, its state, its rows
review            what people decide about the rows
save              the accepted rows as a data set
"""
